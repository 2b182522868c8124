# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# For modules that run a queue in C: cimport from here what virtqueue.py exports to Python.
from vhost.chain cimport Buffer, Chain
from vhost.device_queue cimport DeviceQueue
from vhost.driver_queue cimport DriverQueue
