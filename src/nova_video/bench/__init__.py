"""`nova bench`: the speed and memory of sampling and training, measured on the user's own device."""
