"""The commands: a parser each, and the call of one function of the packages below."""
