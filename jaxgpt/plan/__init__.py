"""What a training step will need, known before it runs: memory, exchanges, time and cost.

The very step that would train is compiled from shapes, for devices that need not be here, and
what the compiler says of it is put together with the data sheet of the device.
"""
