"""The intermediate representation: values that passes, executors and users share."""
