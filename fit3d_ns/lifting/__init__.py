"""Features onto frozen geometry by solving a linear problem instead of training.

With geometry fixed, the render of the features ``x`` is linear, ``A x``, so weighted aggregation over all views
(``D^-1 A^T B``) and a few refinement steps do in seconds what gradient descent does in thousands of steps.
Importing this package imports none of its modules.
"""
