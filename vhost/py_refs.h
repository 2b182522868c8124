/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * References, counted by hand where that is worth it, and whether an object may be used again: knows how each
 * build of CPython counts, and nothing else.
 */
#ifndef VHOST_PY_REFS_H
#define VHOST_PY_REFS_H

#include <Python.h>

#ifdef Py_GIL_DISABLED
#define VHOST_FREE_THREADED 1
#else
#define VHOST_FREE_THREADED 0
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

/* A tuple that nobody else has may be filled again, as zip() does with its own, if it is only ever filled with what
 * the collector need not know: it may have stopped to look at this one. */
static inline int py_unique_tuple(PyObject *tuple)
{
	if (!py_unique(tuple))
		return 0;
#if PY_VERSION_HEX >= 0x030e0000
	((PyTupleObject *)tuple)->ob_hash = -1; /* of the old values */
#endif
	return 1;
}

/* n references at once. */
static inline void take_references(PyObject *object, Py_ssize_t n)
{
#if defined(Py_GIL_DISABLED) || defined(Py_REF_DEBUG)
	while (n--)
		Py_INCREF(object);
#else
	Py_SET_REFCNT(object, Py_REFCNT(object) + n);
#endif
}

/* The caller holds another one. */
static inline void drop_references(PyObject *object, Py_ssize_t n)
{
#if defined(Py_GIL_DISABLED) || defined(Py_REF_DEBUG)
	while (n--)
		Py_DECREF(object);
#else
	Py_SET_REFCNT(object, Py_REFCNT(object) - n);
#endif
}

/* For Cython: from here on it counts this reference, which was the caller's. */
#define handed_over(object) (object)

#endif
