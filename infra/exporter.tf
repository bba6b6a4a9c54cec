locals {
  # Which the image's CUDA takes as it is, whereas an L4's older one needs what the image brings for it.
  new_driver = var.gpu && var.gpu_type == "nvidia-rtx-pro-6000"

  exporter_settings = merge(local.settings, {
    ENGINE            = var.engine
    MEMORY_BUDGET_MIB = var.memory_budget_mib
    BASE_CACHE        = var.base_cache ? "auto" : "never"
    VERIFY_LOGITS     = var.verify_logits ? "auto" : "never"
  })
}

resource "google_cloud_run_v2_job" "exporter" {
  name                = local.job
  location            = var.region
  deletion_protection = false # it keeps nothing
  launch_stage        = local.new_driver ? "BETA" : null

  template {
    task_count  = 1 # the trigger asks for more where the base is large
    parallelism = var.parallelism

    template {
      service_account               = google_service_account.runtime["exporter"].email
      timeout                       = "${var.task_timeout_seconds}s"
      max_retries                   = var.max_attempts - 1
      execution_environment         = "EXECUTION_ENVIRONMENT_GEN2"
      gpu_zonal_redundancy_disabled = var.gpu ? true : null # a task that is lost with its zone goes on elsewhere

      dynamic "node_selector" {
        for_each = var.gpu ? [var.gpu_type] : []

        content {
          accelerator = node_selector.value
        }
      }

      containers {
        image = local.placeholder.job

        resources {
          limits = merge(
            { cpu = tostring(var.exporter_cpu), memory = "${var.exporter_memory_gib}Gi" },
            var.gpu ? { "nvidia.com/gpu" = "1" } : {},
          )
        }

        dynamic "env" {
          for_each = merge(local.exporter_settings, local.new_driver ? { LD_LIBRARY_PATH = "/usr/local/nvidia/lib64" } : {})

          content {
            name  = env.key
            value = env.value
          }
        }

        dynamic "env" {
          for_each = var.hf_token_secret == null ? [] : [var.hf_token_secret]

          content {
            name = "HF_TOKEN"

            value_source {
              secret_key_ref {
                secret  = env.value
                version = "latest" # so that a new token is rotated in by adding a version
              }
            }
          }
        }
      }
    }
  }

  lifecycle {
    # The build deploys images, by digest; gcloud labels what it deploys.
    ignore_changes = [template[0].template[0].containers[0].image, template[0].labels, client, client_version]
  }

  depends_on = [google_project_service.used, google_secret_manager_secret_iam_member.hf_token]
}
