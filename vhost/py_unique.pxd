# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from cpython.object cimport PyObject


cdef extern from "py_unique.h":
    bint FREE_THREADED
    bint py_unique(PyObject *) noexcept
    bint py_unique_tuple(PyObject *) noexcept
