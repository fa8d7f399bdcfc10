"""Commands as the loop runs them: each in a process of its own, once, with a record."""
