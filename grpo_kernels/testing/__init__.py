"""For your tests of a loss, and ours: the accuracy rule (``compare``) and ragged batches (``inputs``)."""
