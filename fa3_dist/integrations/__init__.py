"""Adapters to other libraries. Each is imported by name and needs its library only then."""
