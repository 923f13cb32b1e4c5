"""Where stages run: in this process, in a process per device, or on a Ray cluster."""
