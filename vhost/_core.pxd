# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# csrc/*.h as Cython sees them: declarations only, the comments are in the headers.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "barrier.h" nogil:
    int READ_ONCE(int)
    int LOAD_ACQUIRE(int)
    bint likely(bint)
    bint unlikely(bint)


cdef extern from "mapping_unit.h" nogil:
    uint64_t mapping_unit(int)


cdef extern from "guest_memory.h" nogil:
    enum:
        GUEST_MEMORY_MAX_REGIONS

    struct guest_region:
        uint64_t guest_addr
        uint64_t user_addr
        uint64_t size
        uint8_t *host

    struct guest_memory:
        uint32_t nregions
        guest_region *by_guest
        guest_region *by_user

    int guest_memory_init(guest_memory *, const guest_region *, uint32_t, uint32_t *)
    void guest_memory_destroy(guest_memory *)
    const guest_region *guest_memory_search(guest_memory *, uint64_t)
    uint8_t *guest_memory_at(guest_memory *, uint64_t, uint64_t *)
    uint8_t *guest_memory_area(guest_memory *, uint64_t, uint64_t)
    uint8_t *guest_memory_user_area(guest_memory *, uint64_t, uint64_t)
    uint8_t *guest_memory_user_at(guest_memory *, uint64_t, uint64_t *)
    bint guest_memory_user_to_guest(guest_memory *, uint64_t, uint64_t *)
    uint64_t guest_memory_read(guest_memory *, uint64_t, void *, uint64_t)
    uint64_t guest_memory_write(guest_memory *, uint64_t, const void *, uint64_t)


cdef extern from "iotlb.h" nogil:
    enum:
        IOTLB_MAX_ENTRIES
        IOTLB_READ
        IOTLB_WRITE
        IOTLB_ACCESS_MASK

    struct iotlb:
        guest_memory view
        uint32_t nentries

    struct iotlb_miss:
        uint64_t iova
        uint32_t access

    int iotlb_init(iotlb *, guest_memory *)
    void iotlb_destroy(iotlb *)
    int iotlb_update(iotlb *, uint64_t, uint64_t, uint64_t, uint32_t)
    void iotlb_invalidate(iotlb *, uint64_t, uint64_t)
    void iotlb_clear(iotlb *)
    void iotlb_set_memory(iotlb *, guest_memory *)
    iotlb_miss iotlb_missing(iotlb *, uint64_t, uint64_t, uint32_t)
    uint8_t *iotlb_at(iotlb *, uint64_t, uint32_t, uint64_t *)
    uint8_t *iotlb_area(iotlb *, uint64_t, uint64_t, uint32_t)


cdef extern from "eventfd.h" nogil:
    int eventfd_signal(int)


cdef extern from "call.h" nogil:
    struct virtqueue_call:
        int fd
        bint vduse
        uint32_t vq

    int call_driver "virtqueue_call" (const virtqueue_call *)


cdef extern from "sigbus.h" nogil:
    int sigbus_register(void *, size_t, int *)
    void sigbus_unregister(int)
    int sigbus_install()
    bint sigbus_installed()
    const int *sigbus_repairs()


cdef extern from "chain.h" nogil:
    struct vhost_chain:
        uint16_t id
        uint16_t ndesc
        uint32_t out_num
        uint32_t in_num
        uint32_t out_len
        uint32_t in_len
        iovec *iov

    void vhost_chain_init(vhost_chain *)
    void vhost_chain_destroy(vhost_chain *)


cdef extern from "vring.h" nogil:
    enum:
        VRING_SPLIT_NUM_MAX
        VRING_PACKED_NUM_MAX
        VRING_DESC_ALIGN
        VRING_SPLIT_AVAIL_ALIGN
        VRING_SPLIT_USED_ALIGN
        VRING_PACKED_EVENT_ALIGN

    struct vring_desc:
        pass

    struct vring_used:
        uint16_t idx

    size_t vring_desc_size(uint32_t)
    size_t vring_driver_size(uint32_t, int)
    size_t vring_device_size(uint32_t, int)


cdef extern from "inflight.h" nogil:
    enum:
        INFLIGHT_ALIGN

    struct queue_inflight "inflight":
        uint32_t old_num
        uint32_t old_popped

    uint64_t inflight_region_size(uint32_t, bint)


cdef extern from "virtqueue.h" nogil:
    enum virtqueue_fault:
        VQ_OK
        VQ_ADDRESS
        VQ_REQUEST_HEADER
        VQ_REQUEST_STATUS
        VQ_ACCESS
        VQ_MISS

    const char *virtqueue_fault_text(virtqueue_fault)

    struct virtqueue_fault_report:
        virtqueue_fault fault
        uint16_t head
        uint64_t value
        uint64_t limit

    struct virtqueue_areas:
        void *desc
        void *avail
        void *used

    struct virtqueue_config:
        virtqueue_areas areas
        guest_memory *mem
        iotlb *iotlb
        uint32_t num
        uint32_t base
        bint packed
        bint indirect
        bint event_idx
        bint in_order
        bint swapped
        void *inflight
        uint32_t inflight_num

    struct virtqueue_log

    struct virtqueue:
        uint32_t num
        bint is_packed
        bint indirect
        bint event_idx
        bint in_order
        bint swapped
        bint read_only
        bint notify_off
        uint32_t inuse
        virtqueue_fault_report report
        virtqueue_log *log
        queue_inflight *inflight

    int virtqueue_init(virtqueue *, const virtqueue_config *)
    void virtqueue_destroy(virtqueue *)
    void virtqueue_set_memory(virtqueue *, guest_memory *, const virtqueue_areas *)
    void virtqueue_unmap(virtqueue *, uint64_t, uint32_t)
    void virtqueue_map(virtqueue *, const virtqueue_areas *)
    bint virtqueue_is_mapped(const virtqueue *)
    void virtqueue_retry(virtqueue *)
    int virtqueue_pop(virtqueue *, vhost_chain *)
    int virtqueue_pop_batch(virtqueue *, vhost_chain **, unsigned int)
    int virtqueue_unpop(virtqueue *, const vhost_chain *)
    int virtqueue_fill(virtqueue *, uint16_t, uint32_t)

    struct virtqueue_used:
        uint32_t id
        uint32_t written

    unsigned int virtqueue_fill_batch(virtqueue *, const virtqueue_used *, unsigned int)
    void virtqueue_flush(virtqueue *)
    int virtqueue_push(virtqueue *, uint16_t, uint32_t)
    bint virtqueue_should_notify(virtqueue *)
    void virtqueue_disable_notification(virtqueue *)
    bint virtqueue_enable_notification(virtqueue *)
    bint virtqueue_has_work(virtqueue *)
    uint32_t virtqueue_base(const virtqueue *)

    struct virtqueue_buf:
        uint64_t addr
        uint32_t len

    struct driver_config:
        virtqueue_areas areas
        uint32_t num
        uint32_t base
        bint packed
        bint event_idx
        bint in_order
        vring_desc *indirect
        uint64_t indirect_addr
        uint32_t indirect_max

    struct driver_queue:
        uint32_t num
        bint is_packed
        bint event_idx
        bint in_order
        bint cb_off
        uint32_t num_free
        virtqueue_fault_report report

    int driver_queue_init(driver_queue *, const driver_config *)
    void driver_queue_destroy(driver_queue *)
    uint32_t driver_queue_base(const driver_queue *)
    uint32_t driver_queue_resume_base(const driver_queue *)
    int virtqueue_add(driver_queue *, const virtqueue_buf *, unsigned int, unsigned int, uint64_t)

    struct virtqueue_request:
        const virtqueue_buf *bufs
        # `in` is a keyword of Cython
        unsigned int out_ "out"
        unsigned int in_ "in"
        uint64_t token

    int virtqueue_add_batch(driver_queue *, const virtqueue_request *, unsigned int)
    bint virtqueue_kick_prepare(driver_queue *)
    int virtqueue_get_buf(driver_queue *, uint64_t *, uint32_t *)
    void virtqueue_disable_cb(driver_queue *)
    bint virtqueue_enable_cb(driver_queue *)
    bint virtqueue_more_used(driver_queue *)


cdef extern from "dirty_log.h" nogil:
    enum:
        DIRTY_LOG_PAGE

    struct dirty_log:
        uint8_t *map
        uint64_t size

    bint dirty_log_covers(const dirty_log *, uint64_t, uint64_t)
    uint64_t dirty_log_limit(const dirty_log *)
    bint dirty_log_mark(const dirty_log *, uint64_t, uint64_t)
    uint64_t dirty_log_take(uint64_t *)


cdef extern from "virtqueue_log.h" nogil:
    struct virtqueue_log:
        dirty_log map
        bint ring
        bint used_given
        uint64_t used
        int fd
        bint changed

    int virtqueue_set_log(virtqueue *, virtqueue_log *)
    void virtqueue_log_chain(virtqueue *, const guest_memory *, const vhost_chain *, uint32_t)
    void virtqueue_mark_chain(virtqueue *, const guest_memory *, const vhost_chain *, uint32_t)
    void virtqueue_log_write(virtqueue *, uint64_t, uint64_t)
    bint virtqueue_should_tell_log(virtqueue *)


cdef extern from "blk_request.h" nogil:
    enum:
        BLK_RANGES_MAX


cdef extern from "blk_map.h" nogil:
    struct blk_map:
        char *base
        uint64_t size
        int broken

    blk_map *blk_map_new(int, bint)
    void blk_map_free(blk_map *)
    bint blk_map_broken(const blk_map *)


cdef extern from "blk_disk.h" nogil:
    enum:
        BLK_ID_BYTES

    enum blk_pace:
        BLK_WAITS
        BLK_CACHED
        BLK_MEMORY

    struct blk_disk:
        int fd
        blk_pace pace
        blk_map *map
        bint read_only
        bint block_device
        uint64_t capacity
        uint32_t max_discard_sectors
        uint32_t max_discard_seg
        uint32_t max_write_zeroes_sectors
        uint32_t max_write_zeroes_seg
        char *serial

    blk_pace blk_disk_pace(int)
    int blk_disk_discard(const blk_disk *, uint64_t, uint64_t)
    int blk_disk_zero(const blk_disk *, uint64_t, uint64_t, bint)


cdef extern from "engine.h" nogil:
    struct engine_ops:
        pass

    struct engine_queue:
        pass

    struct engine:
        unsigned int nworkers

    struct engine_queue_config:
        virtqueue *vq
        const engine_ops *ops
        int kick
        int source
        virtqueue_call call
        const engine *owner

    unsigned int engine_idlest(const engine *)
    int engine_init(engine *, unsigned int, const char *, const int *, const int *)
    void engine_destroy(engine *)
    int engine_notice(const engine *)
    int engine_attach(engine *, unsigned int, engine_queue *, const engine_queue_config *)
    void engine_detach(engine *, engine_queue *)
    void engine_hold(engine_queue *)
    void engine_release(engine_queue *, bint)


cdef extern from "blk_pool.h" nogil:
    struct blk_pool:
        pass

    void blk_pool_init(blk_pool *, const char *)
    void blk_pool_destroy(blk_pool *)


cdef extern from "blk_uring.h" nogil:
    int blk_uring_probe()


cdef extern from "engine_blk.h" nogil:
    enum blk_aio:
        BLK_AIO_SYNC
        BLK_AIO_THREADS
        BLK_AIO_URING

    struct blk_queue:
        engine_queue engine
        int wake

    const engine_ops blk_engine_ops
    int blk_queue_init(blk_queue *, const blk_disk *, blk_aio, blk_pool *, bint)
    void blk_queue_destroy(blk_queue *)


cdef extern from "virtio_net.h" nogil:
    enum:
        NET_ETH_HDR
        NET_FRAME_MAX
        NET_HDR_LEGACY
        NET_HDR_MAX
        NET_HDR_F_NEEDS_CSUM
        NET_VLAN_TAG

    struct net_header:
        uint8_t flags
        uint8_t gso_type
        uint16_t num_buffers


cdef extern from "net_csum.h" nogil:
    void net_finish_csum(uint8_t *, uint32_t, const net_header *)


cdef extern from "driver_net.h" nogil:
    enum:
        NET_BURST
        NET_SEQ
        NET_SLOT_ALIGN

    struct net_slots:
        uint8_t *host
        uint64_t addr
        uint32_t size
        uint32_t num

    struct net_tx:
        uint32_t nfree

    struct net_out:
        const void *data
        uint32_t len
        const net_header *header

    int net_tx_init(net_tx *, driver_queue *, const net_slots *, uint32_t, int)
    void net_tx_destroy(net_tx *)
    uint32_t net_tx_longest(const net_tx *)
    int net_tx_reap(net_tx *)
    int net_tx_send(net_tx *, const net_out *, unsigned int)

    enum net_fault:
        NET_OK

    const char *net_fault_text(net_fault)

    struct net_rx:
        net_fault fault
        uint64_t value
        uint64_t limit
        bint pending
        uint64_t dropped

    struct net_in:
        net_header header
        uint32_t len

    int net_rx_init(net_rx *, driver_queue *, const net_slots *, uint32_t, bint, int)
    void net_rx_destroy(net_rx *)
    int net_rx_fill(net_rx *)
    int net_rx_take(net_rx *, net_in *, unsigned int)
    void net_rx_copy(const net_rx *, const net_in *, uint8_t *)
    int net_rx_release(net_rx *)

    struct net_pump:
        const uint8_t *frame
        uint32_t len
        int64_t seq_at
        uint64_t seq
        uint64_t count
        uint64_t frames
        uint64_t lost
        uint64_t repeated
        uint64_t others

    int net_tx_pump(net_tx *, net_pump *, int, int64_t)
    int net_rx_pump(net_rx *, net_pump *, int, int64_t)


cdef extern from "net_counters.h" nogil:
    enum:
        NET_DROPS
        NET_DROP_DISABLED

    const char *const *net_drop_names

    struct net_counters:
        uint64_t tx_frames
        uint64_t tx_bytes
        uint64_t rx_frames
        uint64_t rx_bytes
        uint64_t *dropped


cdef extern from "net_frame.h" nogil:
    struct net_offloads:
        bint csum
        uint8_t gso

    struct net_frame_rules:
        net_offloads offloads
        uint32_t hdr_len
        uint32_t longest


cdef extern from "net_receive.h" nogil:
    struct net_receiver:
        uint32_t hdr_len
        uint32_t longest
        bint mergeable
        net_offloads offloads


cdef extern from "net_wire.h" nogil:
    struct net_wire_ops:
        pass

    struct net_pair:
        const net_wire_ops *wire
        net_frame_rules rules
        net_receiver rx
        net_counters counters
        net_pair *peer
        net_pair *next
        const uint8_t *source
        uint32_t source_len

    int net_pair_init(net_pair *)
    void net_pair_destroy(net_pair *)

    const net_wire_ops net_wire_drop
    const net_wire_ops net_wire_peer
    const net_wire_ops net_wire_source


cdef extern from "net_fd.h" nogil:
    int net_fd_connect(net_pair *, int, bint)


cdef extern from "engine_net.h" nogil:
    struct net_queue:
        engine_queue engine
        net_pair *pair

    void net_queue_deliver(net_queue *, const void *, uint32_t)

    const engine_ops net_transmit_ops
    const engine_ops net_receive_ops
