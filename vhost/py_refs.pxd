# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
from cpython.object cimport PyObject


cdef extern from "py_refs.h":
    bint FREE_THREADED "VHOST_FREE_THREADED"
    bint py_unique(PyObject *) noexcept
    bint py_unique_tuple(PyObject *) noexcept
    void take_references(PyObject *, Py_ssize_t) noexcept
    void drop_references(PyObject *, Py_ssize_t) noexcept
    object handed_over(PyObject *)


cdef extern from "Python.h":
    # As they are, so that each reference is counted where it is written and nowhere else.
    void Py_INCREF(PyObject *)
    void Py_DECREF(PyObject *)
    void PyList_SET_ITEM(PyObject *, Py_ssize_t, PyObject *)
    PyObject *PyList_GET_ITEM(PyObject *, Py_ssize_t)
