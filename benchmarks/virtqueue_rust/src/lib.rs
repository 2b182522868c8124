// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! rust-vmm's virtio-queue on the `virtqueue` benchmark; the shape is that of virtqueue_bench.h.
//! What its own benchmark does: iterate over chains and their descriptors, and add used elements.

use std::ffi::c_void;
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const DESCRIPTORS: u16 = 128;
const WRITTEN: u32 = 0x1000;
const PROT: i32 = 3; // PROT_READ | PROT_WRITE
const FLAGS: i32 = 1; // MAP_SHARED

#[repr(C)]
pub struct Memory {
    host: *mut u8,
    guest: u64,
    size: u64,
    desc: u64,
    avail: u64,
    used: u64,
    num: u32,
}

#[repr(C)]
pub struct Driver {
    refill: extern "C" fn(*mut c_void),
    driver: *mut c_void,
}

pub struct Device {
    mem: GuestMemoryMmap<()>,
    queue: Queue,
}

fn device(m: &Memory) -> Option<Device> {
    // SAFETY: the caller has this memory mapped for as long as the device lives.
    let region = unsafe {
        MmapRegion::build_raw(m.host, m.size as usize, PROT, FLAGS)
    }
    .ok()?;
    let region = GuestRegionMmap::new(region, GuestAddress(m.guest)).ok()?;
    let mem = GuestMemoryMmap::from_regions(vec![region]).ok()?;
    let mut queue = Queue::new(m.num as u16).ok()?;
    queue.set_size(m.num as u16);
    queue.try_set_desc_table_address(GuestAddress(m.guest + m.desc)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(m.guest + m.avail)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(m.guest + m.used)).ok()?;
    queue.set_ready(true);
    queue.is_valid(&mem).then_some(Device { mem, queue })
}

/// # Safety
/// `memory` is valid, and what it describes stays mapped until `rust_delete`.
#[no_mangle]
pub unsafe extern "C" fn rust_new(memory: *const Memory) -> *mut Device {
    match device(&*memory) {
        Some(device) => Box::into_raw(Box::new(device)),
        None => std::ptr::null_mut(),
    }
}

/// # Safety
/// `device` is from `rust_new`, and used no more.
#[no_mangle]
pub unsafe extern "C" fn rust_delete(device: *mut Device) {
    drop(Box::from_raw(device));
}

/// ns to iterate over all descriptors of all chains, `rounds` times. Nothing is given back: its iterator
/// needs that no more than its own benchmark does.
///
/// # Safety
/// `device` is from `rust_new`; `descriptors` is valid.
#[no_mangle]
pub unsafe extern "C" fn rust_walk(
    device: *mut Device,
    driver: Driver,
    rounds: u32,
    descriptors: *mut u64,
) -> u64 {
    let Device { mem, queue } = &mut *device;
    let (mut total, mut seen) = (0, 0);
    for _ in 0..rounds {
        (driver.refill)(driver.driver);
        let start = Instant::now();
        let mut found = 0u64;
        if let Ok(chains) = queue.iter(&*mem) {
            chains.for_each(|chain| chain.for_each(|_| found += 1));
        }
        total += start.elapsed().as_nanos() as u64;
        seen += found;
    }
    *descriptors = seen;
    total
}

/// ns to add 128 used elements, `rounds` times; each is published by itself, there is no other way.
///
/// # Safety
/// `device` is from `rust_new`.
#[no_mangle]
pub unsafe extern "C" fn rust_push(device: *mut Device, driver: Driver, rounds: u32, _together: bool) -> u64 {
    let Device { mem, queue } = &mut *device;
    let mut total = 0;
    for _ in 0..rounds {
        (driver.refill)(driver.driver);
        let start = Instant::now();
        for head in 0..DESCRIPTORS {
            if queue.add_used(&*mem, head, WRITTEN).is_err() {
                break;
            }
        }
        total += start.elapsed().as_nanos() as u64;
    }
    total
}
