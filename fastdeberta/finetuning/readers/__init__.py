"""Readers: files as each benchmark distributes them -> examples, one module a family."""
