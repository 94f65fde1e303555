"""Systems that adapt a trained one."""
