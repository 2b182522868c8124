/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * A wire with a descriptor, which never blocks: a tap, where each frame has a header before it as a driver's
 * have (linux/if_tun.h, IFF_VNET_HDR), or a Unix socket that keeps messages apart, where a message is a frame
 * and nothing else.
 */
#ifndef VHOST_NET_FD_H
#define VHOST_NET_FD_H

#include "net_wire.h"

/* Frames that were read; they wait here if there are too few buffers for them. */
struct net_input;

/* Connects the pair: 0 or -ENOMEM. Its owner keeps the descriptor, and has it waited for as the receive
 * queue's source. */
int net_fd_connect(struct net_pair *p, int fd, bool socket);
void net_fd_disconnect(struct net_pair *p);

#endif
