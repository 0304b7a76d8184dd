"""What runs inside one slot, a process of its own: it claims trials and attempts them until its worker ends it.

In come a configuration and orders, as lines on standard input. Out go events, as lines on standard output, and in the
database reports, results and checkpoints, written only while the slot holds the trial's lease; a result that could not
be delivered stays in the spool.
"""
