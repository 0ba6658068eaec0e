"""From array records to batches on the devices."""
