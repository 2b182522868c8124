/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Requests are parsed in place: the chain's iovecs are private copies, so the header is cut off
 * their front and the status byte off their end, and what is left goes to the kernel as it is,
 * whatever the layout (VIRTIO_F_ANY_LAYOUT, 2.7.4). Guest memory is read once: the header and the
 * ranges into locals, the data by the kernel.
 */
#include "blk_request.h"

static void refuse(struct blk_request *r, uint8_t status)
{
	r->todo = BLK_NOTHING;
	r->status = status;
}

/* On the null device everything is done as soon as it is known to be right. */
static void accept(const struct blk_disk *disk, struct blk_request *r, enum blk_todo todo)
{
	r->todo = disk->fd < 0 ? BLK_NOTHING : todo;
	r->status = BLK_S_OK;
}

static void parse_transfer(const struct blk_disk *disk, struct blk_request *r, bool write,
			   uint64_t sector)
{
	/* Data comes in whole sectors (5.2.6.1); QEMU's devices refuse the rest in the same way. */
	if (unlikely(r->data.len % 512) || unlikely(write && disk->read_only) ||
	    unlikely(!blk_disk_has(disk, sector, r->data.len >> BLK_SECTOR_SHIFT))) {
		refuse(r, BLK_S_IOERR);
		return;
	}
	accept(disk, r, unlikely(!r->data.len) ? BLK_NOTHING : write ? BLK_WRITE : BLK_READ);
	r->at = sector << BLK_SECTOR_SHIFT;
	if (disk->fd < 0)
		r->data.len = 0;
}

static void parse_get_id(const struct blk_disk *disk, struct blk_request *r)
{
	span_put(&r->data, disk->serial, r->data.len < BLK_ID_BYTES ? r->data.len : BLK_ID_BYTES);
	refuse(r, BLK_S_OK);
}

enum virtqueue_fault blk_request_parse(const struct blk_disk *disk, struct blk_request *r,
				       bool writethrough)
{
	struct vhost_chain *c = &r->chain;
	struct blk_span out = { c->iov, c->out_num, c->out_len, 0 };
	struct blk_span in = { c->iov + c->out_num, c->in_num, c->in_len, 0 };
	struct blk_req_header header;

	if (unlikely(out.len < sizeof(header)))
		return VQ_REQUEST_HEADER;
	if (unlikely(!in.len))
		return VQ_REQUEST_STATUS;
	span_take(&out, &header, sizeof(header));
	r->last = in.iov + in.num - 1;
	r->status_at = span_cut_last_byte(&in);
	r->room = in.len;
	r->fills = header.type == BLK_T_IN || header.type == BLK_T_GET_ID;
	r->data = r->fills ? in : out;
	r->stable = writethrough;
	r->joined = NULL;

	switch (header.type) {
	case BLK_T_IN:
	case BLK_T_OUT:
		parse_transfer(disk, r, header.type == BLK_T_OUT, header.sector);
		break;
	case BLK_T_FLUSH:
		accept(disk, r, BLK_FLUSH);
		break;
	case BLK_T_GET_ID:
		parse_get_id(disk, r);
		break;
	case BLK_T_DISCARD:
	case BLK_T_WRITE_ZEROES:
		/* Also on the null device: what they hold is looked at when they run. */
		r->todo = header.type == BLK_T_DISCARD ? BLK_DISCARD : BLK_ZERO;
		break;
	default: /* SCSI, secure erase, lifetime, zones: not offered */
		refuse(r, BLK_S_UNSUPP);
	}
	return VQ_OK;
}

/* ------------------------------------------------------------------ discard and write-zeroes */

static int change_range(const struct blk_disk *disk, bool discard, const struct blk_req_range *range)
{
	uint64_t offset = range->sector << BLK_SECTOR_SHIFT;
	uint64_t len = (uint64_t)range->num_sectors << BLK_SECTOR_SHIFT;

	if (!len)
		return 0;
	return discard ? blk_disk_discard(disk, offset, len) :
			 blk_disk_zero(disk, offset, len, range->flags & BLK_RANGE_F_UNMAP);
}

/* All of them are looked at before the first is done, so that a bad one leaves no trace. The unknown flag
 * decides over the bad range (5.2.6.2: MUST be UNSUPP). */
static int check_ranges(const struct blk_disk *disk, bool discard, const struct blk_req_range *range,
			unsigned n)
{
	uint32_t max = discard ? disk->max_discard_sectors : disk->max_write_zeroes_sectors;
	unsigned i;

	for (i = 0; i < n; i++)
		if (range[i].flags & ~(discard ? 0 : BLK_RANGE_F_UNMAP))
			return -EOPNOTSUPP;
	if (disk->read_only)
		return -EROFS;
	for (i = 0; i < n; i++)
		if (range[i].num_sectors > max ||
		    !blk_disk_has(disk, range[i].sector, range[i].num_sectors))
			return -EIO;
	return 0;
}

static int run_ranges(const struct blk_disk *disk, bool discard, struct blk_span *s, bool stable)
{
	struct blk_req_range range[BLK_RANGES_MAX];
	uint32_t max_seg = discard ? disk->max_discard_seg : disk->max_write_zeroes_seg;
	unsigned i, n;
	int rc;

	n = s->len / sizeof(range[0]);
	if (s->len % sizeof(range[0]) || !n || n > max_seg || n > BLK_RANGES_MAX)
		return -EIO;
	span_take(s, range, s->len);
	rc = check_ranges(disk, discard, range, n);
	if (rc || disk->fd < 0)
		return rc;
	for (i = 0; i < n && !rc; i++)
		rc = change_range(disk, discard, &range[i]);
	/* A discard promises nothing about what is read afterwards, a zeroed range does. */
	return !rc && stable && !discard ? blk_disk_flush(disk) : rc;
}

/* ------------------------------------------------------------------ doing it */

void blk_request_run(const struct blk_disk *disk, struct blk_request *r)
{
	int rc = 0;

	switch (r->todo) {
	case BLK_READ:
	case BLK_WRITE:
		rc = blk_disk_move(disk, r->todo == BLK_WRITE, &r->data, &r->at, r->stable);
		/* That a file system cannot do is no answer to a read or a write. */
		rc = rc ? -EIO : 0;
		break;
	case BLK_FLUSH:
		rc = blk_disk_flush(disk) ? -EIO : 0;
		break;
	case BLK_DISCARD:
	case BLK_ZERO:
		rc = run_ranges(disk, r->todo == BLK_DISCARD, &r->data, r->stable);
		break;
	}
	blk_request_done(r, rc);
}

uint32_t blk_request_end(struct blk_request *r)
{
	uint32_t written = r->fills ? r->room - r->data.len : 0;

	WRITE_ONCE(*r->status_at, r->status);
	/* What was cut off is there again. */
	if (unlikely(r->data.cut) && r->fills)
		span_mend(&r->data);
	r->last->iov_len++;
	return written + 1;
}
