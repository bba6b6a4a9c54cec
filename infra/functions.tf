locals {
  # As many as dispatcher/Dockerfile gives a server: more would queue in it, unseen by Cloud Run.
  threads = 16

  # One image, four functions. Only the gateway comes from outside of what Cloud Run calls internal.
  functions = {
    export_api = {
      name        = "gemma-export-api"
      signature   = "http"
      account     = google_service_account.runtime["dispatcher"].email
      invoker     = google_service_account.invoker["gateway"].member
      ingress     = "INGRESS_TRAFFIC_ALL"
      instances   = var.max_instances
      concurrency = local.threads
      seconds     = 120
    }
    start_export = {
      name        = "gemma-export-start"
      signature   = "cloudevent"
      account     = google_service_account.runtime["trigger"].email
      invoker     = google_service_account.invoker["push"].member
      ingress     = "INGRESS_TRAFFIC_INTERNAL_ONLY"
      instances   = var.max_instances
      concurrency = local.threads
      seconds     = local.push_seconds
    }
    fail_export = {
      name        = "gemma-export-fail"
      signature   = "cloudevent"
      account     = google_service_account.runtime["trigger"].email
      invoker     = google_service_account.invoker["push"].member
      ingress     = "INGRESS_TRAFFIC_INTERNAL_ONLY"
      instances   = var.max_instances
      concurrency = local.threads
      seconds     = local.push_seconds
    }
    sweep = {
      name        = "gemma-export-sweep"
      signature   = "http"
      account     = google_service_account.runtime["sweeper"].email
      invoker     = google_service_account.invoker["scheduler"].member
      ingress     = "INGRESS_TRAFFIC_INTERNAL_ONLY"
      instances   = 1
      concurrency = 1
      seconds     = 900
    }
  }

  function_settings = merge(
    local.settings,
    {
      MAX_UNFINISHED_PER_USER = var.max_unfinished_per_user
      DOWNLOAD_URL_SECONDS    = var.download_url_seconds
      SIGNING_ACCOUNT         = google_service_account.runtime["dispatcher"].email
    },
    var.check_jwt ? {
      JWT_ISSUER   = local.jwt.issuer
      JWT_AUDIENCE = local.jwt.audience
      JWT_JWKS_URL = local.jwt.jwks_url
    } : {},
  )
}

resource "google_cloud_run_v2_service" "function" {
  for_each = local.functions

  name                = each.value.name
  location            = var.region
  ingress             = each.value.ingress
  deletion_protection = false # it keeps nothing

  template {
    service_account                  = each.value.account
    timeout                          = "${each.value.seconds}s"
    max_instance_request_concurrency = each.value.concurrency

    scaling {
      min_instance_count = 0
      max_instance_count = each.value.instances
    }

    containers {
      image = local.placeholder.service

      resources {
        limits            = { cpu = "1", memory = "512Mi" }
        cpu_idle          = true
        startup_cpu_boost = true
      }

      dynamic "env" {
        for_each = merge(local.function_settings, {
          FUNCTION_TARGET         = each.key
          FUNCTION_SIGNATURE_TYPE = each.value.signature
        })

        content {
          name  = env.key
          value = env.value
        }
      }
    }
  }

  lifecycle {
    # The build deploys images, by digest; gcloud names the revision, and labels it.
    ignore_changes = [template[0].containers[0].image, template[0].labels, template[0].revision, client, client_version]
  }

  depends_on = [google_project_service.used]
}

# A binding and not a member: whoever else was let in is put out again by the next apply.
resource "google_cloud_run_v2_service_iam_binding" "invoker" {
  for_each = local.functions

  name     = google_cloud_run_v2_service.function[each.key].name
  location = var.region
  role     = "roles/run.invoker"
  members  = [each.value.invoker]
}

resource "google_cloud_scheduler_job" "sweep" {
  name             = "gemma-export-sweep"
  description      = "Puts right what died, and collects what nobody needs any more."
  region           = var.region
  schedule         = "*/5 * * * *"
  time_zone        = "Etc/UTC"
  attempt_deadline = "900s"

  http_target {
    http_method = "POST"
    uri         = "${google_cloud_run_v2_service.function["sweep"].uri}/"

    oidc_token {
      service_account_email = google_service_account.invoker["scheduler"].email
      audience              = google_cloud_run_v2_service.function["sweep"].uri
    }
  }

  # The next one comes in five minutes anyway.
  retry_config {
    retry_count = 0
  }

  depends_on = [google_project_service.used]
}
