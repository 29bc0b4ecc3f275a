"""Who is compared: the bare products, the peers by one small adapter each, and this library."""
