/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Whether an object may be used again: knows how each build of CPython counts references, and nothing else.
 */
#ifndef VHOST_PY_UNIQUE_H
#define VHOST_PY_UNIQUE_H

#include <Python.h>

#ifdef Py_GIL_DISABLED
#define FREE_THREADED 1
#else
#define FREE_THREADED 0
#endif

/* The caller's reference is the only one, and none can appear while it looks. */
static inline int py_unique(PyObject *object)
{
#if PY_VERSION_HEX >= 0x030e0000
	return PyUnstable_Object_IsUniquelyReferenced(object);
#elif defined(Py_GIL_DISABLED)
	/* Only the owning thread counts in ob_ref_local; the others, each atomically, in ob_ref_shared. */
	return object->ob_tid == _Py_ThreadId() && _Py_atomic_load_uint32_relaxed(&object->ob_ref_local) == 1 &&
	       _Py_atomic_load_ssize_relaxed(&object->ob_ref_shared) == 0;
#else
	return Py_REFCNT(object) == 1;
#endif
}

/* A tuple that nobody else has may be filled again, as zip() does with its own. */
static inline int py_unique_tuple(PyObject *tuple)
{
	if (!py_unique(tuple))
		return 0;
#if PY_VERSION_HEX >= 0x030e0000
	((PyTupleObject *)tuple)->ob_hash = -1; /* of the old values */
#endif
	return 1;
}

#endif
