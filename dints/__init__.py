"""What more than one of the DiNTS scripts needs."""

__version__ = "0.1.0"
