"""Several matrices times the same few vectors, in one call."""
