"""The rules of the house: size, import weight, packaging and documentation, checked like any other behaviour."""
