"""SpIEL: sparse deltas on frozen weights whose positions may move while they are trained, as a method of peft."""
