"""Several matrices that skip the same inputs of the same few vectors, in one call."""
