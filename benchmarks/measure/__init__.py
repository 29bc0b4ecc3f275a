"""How time, memory and devices are measured."""
