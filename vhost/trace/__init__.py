# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Seeing vhost-user: what passes between a front-end and a back-end, decoded and judged.

``records`` is what was on the wire, ``recording`` keeps it in a file; ``Tracer`` makes ``Event`` objects of
records, with the findings of ``lint``; ``Proxy`` sits between two programs and makes the records. Only
the proxy, the relay, the output and the description of descriptors touch the system.
"""
