"""An S3 bucket as a store: s3fs for the verbs, sockets of our own for bulk bytes."""
