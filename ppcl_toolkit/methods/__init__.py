"""Methods to compress by, a file each: what is the source's in it, and what is a reading."""
