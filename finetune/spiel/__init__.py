"""SpIEL: sparse deltas on frozen weights whose positions may move while they are trained, as a method of peft."""

import peft  # noqa: F401  before our own files: its import registers them, which must not happen in the middle of one
