"""How long a network takes on a device: tables, their measurement, their predictions."""
