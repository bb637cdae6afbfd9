"""What is done with a key, in words that belong to no cloud and no key manager."""
