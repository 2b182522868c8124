# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vhost check``: does a back-end or a front-end keep the rules of the vhost-user specification?

rule.py     what a rule is, its verdicts, and the list of all rules
peer.py     a connection at the level of bytes, which remembers what was said
target.py   the back-end under test: how to reach it, what it offers; spawn.py: starting it
rig.py      memory and rings to share with it; work.py: requests that do no harm
rules_*.py  the rules for back-ends, a file a topic
runner.py   all of them in a row; report.py: the outcome for people, JSON and JUnit
"""
