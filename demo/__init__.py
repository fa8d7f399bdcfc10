"""``make demo``: the whole method on procedural rooms, from photos to a probe table, in one command.

A preset of `fit3d_loop` on three rooms, with a control and probes on a fourth, and a page that tells the story. It runs
the command lines that a user would type, and can be stopped and started again at any moment.
"""
