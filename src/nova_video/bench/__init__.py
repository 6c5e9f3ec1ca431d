"""`nova bench`: the speed and memory of sampling and training, measured on the user's own device.

It may import `common`, `io`, `model`, `autoencoders`, `sampling`, `fast`, `text`, `pipeline`, `data` and `training`.
"""
