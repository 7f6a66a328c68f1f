"""What theory expects of any model: second moments of its tensors, and of the loss's gradient.

They are means over random draws of the weights, on the batch at hand, by rules for the operations
of the recorded forward. What has no rule is named, and ends the prediction.
"""
