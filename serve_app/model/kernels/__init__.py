"""Forms of the model's arithmetic that are faster than plain torch on one kind of device."""
