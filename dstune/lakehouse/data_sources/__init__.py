"""Places of rows in a lakehouse; a module a scheme."""
