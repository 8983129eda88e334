"""The teacher run, with no host in it: a host gives it the model, the groups and the samples."""
