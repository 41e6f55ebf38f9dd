"""`dstune evaluate MODEL --against EXPECTED`: whether two models are the same one, and what differs if they are not."""
