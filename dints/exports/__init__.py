"""A trained network in forms that need none of our code, each checked on a real case against the
network.
"""
