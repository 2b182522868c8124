/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Frames are read only while there is a buffer: others wait in the kernel, which drops what is too many. One
 * read, one write a frame; those of a batch lie behind each other.
 */
#define _GNU_SOURCE /* POLLRDHUP */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_fd.h"
#include "net_fit.h"

#define PIECES_MAX 64u /* written as they lie; what has more is copied together first */
#define LINE 64u
/* One byte more than there may be, so that what is longer shows. */
#define SLOT (NET_HDR_MAX + NET_FRAME_MAX + 1)
#define ARENA (4 * SLOT)

struct net_input {
	int fd;
	bool socket;
	bool ended;		  /* nothing will ever come again */
	struct net_offloads able; /* what the frames were made for */
	unsigned at, n;
	struct net_frame frames[ENGINE_BATCH];
	struct iovec iov[ENGINE_BATCH];
	uint8_t data[ARENA];
};

/* ------------------------------------------------------------------ from the driver */

static bool write_frame(const struct net_input *in, const struct net_header *header, const struct iovec *iov,
			unsigned num)
{
	struct iovec all[PIECES_MAX + 1];
	struct msghdr message = { .msg_iov = (struct iovec *)iov, .msg_iovlen = num };
	ssize_t done;

	do {
		if (in->socket) {
			done = sendmsg(in->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
		} else {
			all[0] = (struct iovec){ (void *)header, sizeof(*header) };
			memcpy(all + 1, iov, num * sizeof(*iov));
			done = writev(in->fd, all, (int)num + 1);
		}
	} while (done < 0 && errno == EINTR);
	return done >= 0;
}

static void send_to_fd(struct net_pair *p, struct net_frame *frames, unsigned n)
{
	/* Behind a socket is somebody who is told of nothing that is left to him. */
	static const struct net_offloads none, all = { .csum = true, .gso = 0xff };
	const struct net_offloads *able = p->input->socket ? &none : &all;

	for (unsigned i = 0; i < n; i++) {
		struct net_frame *f = &frames[i];
		struct iovec whole = { p->scratch, f->len };
		enum net_drop why = NET_PASSES;

		if (unlikely(!net_frame_fits(f, able))) {
			why = net_frame_fit(f, p->scratch, &whole);
		} else if (unlikely(f->num > PIECES_MAX)) {
			net_frame_copy(f, p->scratch);
			f->iov = &whole;
			f->num = 1;
		}
		if (likely(!why) && unlikely(!write_frame(p->input, &f->header, f->iov, f->num)))
			why = NET_DROP_WIRE;
		if (unlikely(why))
			net_count(&p->counters.dropped[why], 1);
	}
}

/* ------------------------------------------------------------------ to the driver */

/* Is what was read a frame, for this driver? */
static enum net_drop take(struct net_input *in, struct net_frame *f, struct iovec *iov, uint8_t *data, size_t got)
{
	uint32_t hdr_len = in->socket ? 0 : NET_HDR_MAX;
	struct net_header *h = &f->header;
	bool csum;

	if (got < hdr_len + NET_ETH_HDR)
		return NET_DROP_SHORT;
	if (got > hdr_len + NET_FRAME_MAX)
		return NET_DROP_LONG;
	memset(h, 0, sizeof(*h));
	memcpy(h, data, hdr_len);
	h->flags &= NET_HDR_F_NEEDS_CSUM | NET_HDR_F_DATA_VALID;
	f->len = (uint32_t)got - hdr_len;
	f->num = 1;
	*iov = (struct iovec){ data + hdr_len, f->len };
	f->iov = iov;
	csum = h->flags & NET_HDR_F_NEEDS_CSUM;
	if (csum && (uint32_t)h->csum_start + h->csum_offset + 2 > f->len)
		return NET_DROP_CSUM;
	if (h->gso_type && (!csum || !h->gso_size))
		return NET_DROP_GSO;
	return net_frame_fits(f, &in->able) ? NET_PASSES : net_frame_fit(f, iov->iov_base, iov);
}

/* Of a socket it matters, too, that others with the same open file may have made it one that blocks. */
static ssize_t read_frame(const struct net_input *in, uint8_t *to)
{
	return in->socket ? recv(in->fd, to, SLOT, MSG_DONTWAIT) : read(in->fd, to, SLOT);
}

/* A socket that gives nothing has an empty message, or is at its end: that it says for ever. There may be frames
 * behind an empty message whose sender has gone since. */
static bool has_ended(const struct net_input *in)
{
	struct pollfd p = { .fd = in->fd, .events = POLLRDHUP };
	int left = 0;

	if (poll(&p, 1, 0) != 1 || !(p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)))
		return false;
	return !in->socket || ioctl(in->fd, FIONREAD, &left) || !left;
}

/* Reads a batch: false if there was nothing. */
static bool fill(struct net_pair *p)
{
	struct net_input *in = p->input;
	unsigned reads = 0;
	size_t at = 0;

	in->at = in->n = 0;
	in->able = p->rx.offloads;
	while (reads < ENGINE_BATCH && at + SLOT <= ARENA && !in->ended) {
		ssize_t got = read_frame(in, in->data + at);
		enum net_drop why;

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			break;
		if (!got && has_ended(in)) {
			in->ended = true;
			break;
		}
		reads++;
		why = take(in, &in->frames[in->n], &in->iov[in->n], in->data + at, (size_t)got);
		if (unlikely(why)) {
			net_count(&p->counters.dropped[why], 1);
			continue;
		}
		in->n++;
		at += ((size_t)got + LINE - 1) & ~(size_t)(LINE - 1);
	}
	return reads;
}

/* Those that wait were made for what another driver could do. */
static bool is_outdated(const struct net_pair *p)
{
	const struct net_offloads *now = &p->rx.offloads, *then = &p->input->able;

	return now->csum != then->csum || now->gso != then->gso;
}

static bool receive_from_fd(struct net_pair *p)
{
	struct net_receiver *r = &p->rx;
	struct net_input *in = p->input;
	unsigned done;

	if (unlikely(in->at < in->n && is_outdated(p))) {
		net_count(&p->counters.dropped[NET_DROP_STOPPED], in->n - in->at);
		in->at = in->n;
	}
	r->starved = !net_receiver_ahead(r) && !virtqueue_has_work(r->queue->vq);
	if (r->starved)
		return false;
	if (in->at == in->n && !fill(p))
		return false;
	done = net_receiver_put(r, in->frames + in->at, in->n - in->at);
	in->at += done;
	return done || in->at == in->n; /* that none of what came was a frame is progress, too */
}

static const struct net_wire_ops net_wire_fd = { .send = send_to_fd, .receive = receive_from_fd };

int net_fd_connect(struct net_pair *p, int fd, bool socket)
{
	net_fd_disconnect(p);
	p->input = calloc(1, sizeof(*p->input));
	if (!p->input)
		return -ENOMEM;
	p->input->fd = fd;
	p->input->socket = socket;
	p->wire = &net_wire_fd;
	return 0;
}

void net_fd_disconnect(struct net_pair *p)
{
	free(p->input);
	p->input = NULL;
	p->wire = &net_wire_drop;
}
