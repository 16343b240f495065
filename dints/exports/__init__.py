"""A trained network in forms that need none of our code, each compared with it on a real case."""
