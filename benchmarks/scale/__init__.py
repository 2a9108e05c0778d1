"""How `score` grows: generated files, a classifier that computes nothing, an S3 server that answers late."""
