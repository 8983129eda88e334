"""The student's side, with no host in it: a cache's rows as batch tensors."""
