"""The stages of Algorithm 1, one file each; a stage never imports a stage."""
