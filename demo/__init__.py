"""``make demo``: the whole method on procedural rooms, from photos to a probe table, in one command.

It stands beside the three stages and not in one of them, because it uses all of them and none may know the others. It
runs the same command lines that a user would type, prints them, and can be stopped and started again at any moment.
"""
