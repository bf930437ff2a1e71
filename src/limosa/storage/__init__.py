"""Files a VM needs: images, who may open them, whether two hosts mean the same one, and the cloud-init seed."""
