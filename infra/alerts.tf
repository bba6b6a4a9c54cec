# What alerts look at are fields of log lines, dispatcher/watched.py; what each means and what to do is in README.md.

resource "google_logging_metric" "failed_exports" {
  name        = "gemma-export/failed_exports"
  description = "Exports that failed, by code, and by whether it was something that passes."
  filter      = "resource.type=(\"cloud_run_job\" OR \"cloud_run_revision\") AND jsonPayload.event=\"export_failed\""

  metric_descriptor {
    metric_kind = "DELTA"
    value_type  = "INT64"
    unit        = "1"

    labels {
      key        = "code"
      value_type = "STRING"
    }

    labels {
      key        = "retryable"
      value_type = "STRING"
    }
  }

  label_extractors = {
    code      = "EXTRACT(jsonPayload.code)"
    retryable = "EXTRACT(jsonPayload.retryable)"
  }

  depends_on = [google_project_service.used]
}

locals {
  swept = "resource.type=\"cloud_run_revision\" AND jsonPayload.event=\"swept\""
}

# What is too much is counted, and not read off a distribution, whose percentiles are estimates.
resource "google_logging_metric" "sweeps" {
  for_each = {
    sweeps        = { filter = local.swept, description = "Sweeps that went through the records." }
    stuck_leases  = { filter = "${local.swept} AND jsonPayload.stuck_leases>0", description = "Those that found an export whose holder died half an hour ago, and that nobody took back." }
    oldest_queued = { filter = "${local.swept} AND jsonPayload.oldest_queued_seconds>${var.oldest_queued_minutes * 60}", description = "Those that found an export that has waited for too long for an execution." }
  }

  name        = "gemma-export/${each.key}"
  description = each.value.description
  filter      = each.value.filter

  metric_descriptor {
    metric_kind = "DELTA"
    value_type  = "INT64"
    unit        = "1"
  }

  depends_on = [google_project_service.used]
}

# To look at.
resource "google_logging_metric" "backlog" {
  for_each = {
    unfinished            = { unit = "1", description = "Exports that a sweep found unfinished." }
    oldest_queued_seconds = { unit = "s", description = "How long the export that waits longest has waited for an execution." }
  }

  name            = "gemma-export/${each.key}"
  description     = each.value.description
  filter          = local.swept
  value_extractor = "EXTRACT(jsonPayload.${each.key})"

  metric_descriptor {
    metric_kind = "DELTA"
    value_type  = "DISTRIBUTION"
    unit        = each.value.unit
  }

  bucket_options {
    exponential_buckets {
      num_finite_buckets = 40
      growth_factor      = 1.5
      scale              = 1
    }
  }

  depends_on = [google_project_service.used]
}

resource "google_monitoring_notification_channel" "email" {
  for_each = var.alert_emails

  display_name = "gemma-export: ${each.key}"
  type         = "email"
  labels       = { email_address = each.key }

  depends_on = [google_project_service.used]
}

# A metric can be asked for some minutes after it was made, and a policy that asks before that is refused.
resource "time_sleep" "metrics" {
  create_duration = "600s"

  triggers = {
    names = join(" ", concat(
      [google_logging_metric.failed_exports.name],
      [for metric in google_logging_metric.sweeps : metric.name],
    ))
  }
}

locals {
  channels = concat(var.notification_channels, [for channel in google_monitoring_notification_channel.email : channel.name])

  user_metric = "logging.googleapis.com/user"

  # Of each condition: what is counted, over how many seconds, and how much of it is too much.
  alerts = {
    failed_exports = {
      title = "exports fail"
      conditions = merge(
        {
          for type in ["cloud_run_job", "cloud_run_revision"] :
          "for a passing fault (${type})" => {
            filter  = "metric.type=\"${local.user_metric}/${google_logging_metric.failed_exports.name}\" AND resource.type=\"${type}\" AND metric.labels.retryable=\"true\""
            seconds = 3600
            most    = 0
          }
        },
        {
          "whatever the reason" = {
            filter  = "metric.type=\"${local.user_metric}/${google_logging_metric.failed_exports.name}\" AND resource.type=\"cloud_run_job\""
            seconds = 3600
            most    = var.failed_exports_per_hour - 1
          }
        },
      )
    }
    dead_letters = {
      title = "messages are dead letters"
      conditions = {
        "of job messages" = {
          filter  = "metric.type=\"pubsub.googleapis.com/subscription/dead_letter_message_count\" AND resource.type=\"pubsub_subscription\" AND resource.labels.subscription_id=\"${google_pubsub_subscription.start.name}\""
          seconds = 600
          most    = 0
        }
      }
    }
    stuck_leases = {
      title = "leases are stuck"
      conditions = {
        "after half an hour" = {
          filter  = "metric.type=\"${local.user_metric}/${google_logging_metric.sweeps["stuck_leases"].name}\" AND resource.type=\"cloud_run_revision\""
          seconds = 600
          most    = 0
        }
      }
    }
    oldest_queued = {
      title = "exports wait for too long"
      conditions = {
        "for an execution" = {
          filter  = "metric.type=\"${local.user_metric}/${google_logging_metric.sweeps["oldest_queued"].name}\" AND resource.type=\"cloud_run_revision\""
          seconds = 600
          most    = 0
        }
      }
    }
  }
}

resource "google_monitoring_alert_policy" "threshold" {
  for_each = local.alerts

  display_name          = "gemma-export: ${each.value.title}"
  combiner              = "OR"
  severity              = "ERROR"
  notification_channels = local.channels

  dynamic "conditions" {
    for_each = each.value.conditions

    content {
      display_name = conditions.key

      condition_threshold {
        filter          = conditions.value.filter
        comparison      = "COMPARISON_GT"
        threshold_value = conditions.value.most
        duration        = "0s"

        aggregations {
          alignment_period     = "${conditions.value.seconds}s"
          per_series_aligner   = "ALIGN_DELTA"
          cross_series_reducer = "REDUCE_SUM"
        }
      }
    }
  }

  documentation {
    mime_type = "text/markdown"
    subject   = "gemma-export: ${each.value.title}"
    content   = "What it means and what to do: infra/README.md, section “Alerts”, `${each.key}`."
  }

  alert_strategy {
    auto_close = "86400s"
  }

  depends_on = [time_sleep.metrics]
}

resource "google_monitoring_alert_policy" "no_sweep" {
  display_name          = "gemma-export: nobody sweeps"
  combiner              = "OR"
  severity              = "ERROR"
  notification_channels = local.channels

  conditions {
    display_name = "for half an hour"

    condition_threshold {
      filter                  = "metric.type=\"${local.user_metric}/${google_logging_metric.sweeps["sweeps"].name}\" AND resource.type=\"cloud_run_revision\""
      comparison              = "COMPARISON_LT"
      threshold_value         = 1
      duration                = "300s"
      evaluation_missing_data = "EVALUATION_MISSING_DATA_ACTIVE"

      aggregations {
        alignment_period     = "1800s"
        per_series_aligner   = "ALIGN_DELTA"
        cross_series_reducer = "REDUCE_SUM"
      }
    }
  }

  # The other says nothing where there never was a sweep.
  conditions {
    display_name = "since Scheduler is refused"

    condition_threshold {
      filter          = "metric.type=\"logging.googleapis.com/log_entry_count\" AND resource.type=\"cloud_scheduler_job\" AND resource.labels.job_id=\"${google_cloud_scheduler_job.sweep.name}\" AND metric.labels.severity=\"ERROR\""
      comparison      = "COMPARISON_GT"
      threshold_value = 2
      duration        = "0s"

      aggregations {
        alignment_period     = "1800s"
        per_series_aligner   = "ALIGN_DELTA"
        cross_series_reducer = "REDUCE_SUM"
      }
    }
  }

  documentation {
    mime_type = "text/markdown"
    subject   = "gemma-export: nobody sweeps"
    content   = "What it means and what to do: infra/README.md, section “Alerts”, `no_sweep`."
  }

  alert_strategy {
    auto_close = "86400s"
  }

  depends_on = [time_sleep.metrics]
}

check "somebody_is_told" {
  assert {
    condition     = length(local.channels) > 0
    error_message = "Alerts reach nobody: set alert_emails, or notification_channels."
  }
}

locals {
  billing_account = try(coalesce(var.billing_account, data.google_project.this.billing_account), "")
  mails           = [for channel in google_monitoring_notification_channel.email : channel.name]
}

resource "google_billing_budget" "project" {
  count = var.budget_amount == 0 ? 0 : 1

  billing_account = local.billing_account
  display_name    = "gemma-export in ${var.project_id}"

  budget_filter {
    projects = ["projects/${data.google_project.this.number}"]
  }

  amount {
    specified_amount {
      units = tostring(var.budget_amount)
    }
  }

  dynamic "threshold_rules" {
    for_each = [0.5, 0.9, 1.0]

    content {
      threshold_percent = threshold_rules.value
    }
  }

  threshold_rules {
    threshold_percent = 1.0
    spend_basis       = "FORECASTED_SPEND"
  }

  # Who administers the billing account is told in any case. It takes five channels, and they have to be mail.
  dynamic "all_updates_rule" {
    for_each = length(local.mails) == 0 ? [] : [slice(local.mails, 0, min(5, length(local.mails)))]

    content {
      monitoring_notification_channels = all_updates_rule.value
    }
  }

  lifecycle {
    precondition {
      condition     = local.billing_account != ""
      error_message = "The project's billing account cannot be read: set billing_account, or budget_amount = 0 for no budget."
    }
  }

  depends_on = [google_project_service.used]
}
