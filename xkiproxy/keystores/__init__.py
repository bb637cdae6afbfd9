"""Key stores: the tenants of the proxy, with their credentials, rights, limits and keys."""
