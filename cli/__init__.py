"""The command line: parse, call one function of compress, print."""
